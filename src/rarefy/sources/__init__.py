"""Where models and texts come from: folder, hub id, GGUF file, packaged demo; and tokens cut into windows."""
