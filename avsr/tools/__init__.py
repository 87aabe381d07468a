"""What stands beside training and scoring: corpora, pretraining, estimates, analysis, demos."""
