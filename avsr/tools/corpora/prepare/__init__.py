"""``avsr prepare``: from raw talking-face video to mouth crops, sound and manifests."""
