"""The rates of every stream once it is read. Needs no torch, so that whoever only writes files starts fast."""

SAMPLE_RATE = 16_000  # Hz, of sound
FRAMES_PER_SECOND = 25  # of video
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAMES_PER_SECOND
