"""Text and images: read, split, tokenised or augmented, each with a checksum for the records."""
