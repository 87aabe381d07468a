"""Everything besides training and scoring: corpora, pretraining, estimates, analysis, demos."""
