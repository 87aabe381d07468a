"""Makes corpora of synthetic speech with eSpeak NG, which the extra ``demo`` installs."""
