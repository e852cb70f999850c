"""Makes what every participant of a federation needs: `fedlora deploy`, an engine at a time."""
