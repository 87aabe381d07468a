"""Progress bars, atomically written folders, locks, a process pool, and the machine's cores."""
