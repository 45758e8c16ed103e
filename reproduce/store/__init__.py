"""What is kept on disk: records, model files, and files written whole or not at all."""
