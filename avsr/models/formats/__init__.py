"""Weight files of other projects, read without running their code."""
