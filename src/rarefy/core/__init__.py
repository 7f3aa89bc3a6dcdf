"""Ground floor: errors, strict configs, registries, progress, logs, memory and files. Imports nothing of rarefy."""
