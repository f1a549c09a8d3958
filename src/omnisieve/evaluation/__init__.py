"""Compares methods on questions about clips: the same clips, the same questions, the same budget."""
