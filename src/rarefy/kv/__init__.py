"""The KV cache in coded form: codecs, the store of a layer, and attention that reads it without decoding the past."""
