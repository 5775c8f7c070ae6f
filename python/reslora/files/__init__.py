"""Files of adapters and of base models: saving, loading, exporting, merging on disk."""
