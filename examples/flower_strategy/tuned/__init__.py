"""FlowerTune's layout, with clients of mixed rank."""
