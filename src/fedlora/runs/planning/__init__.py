"""Plans a run before any weight is read: memory, bytes, disk, time, and the ranks that fit."""
