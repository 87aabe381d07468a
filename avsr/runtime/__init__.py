"""Progress bars, atomically written folders, locks, and the machine's cores."""
