"""``avsr prepare debian-speech``: transcribed human English out of packages of Debian's main archive."""
