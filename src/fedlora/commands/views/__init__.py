"""Shows a person what a verb found, each kind of thing in a module of its own."""
