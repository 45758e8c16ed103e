"""Records as tables, sentences and verdicts."""
