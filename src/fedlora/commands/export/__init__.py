"""Takes a model away: the table of ranks, the files, the card, the reading back, the hub."""
