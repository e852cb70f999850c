"""Makes what the participants of a federation over Flower need: `fedlora deploy flower`."""
