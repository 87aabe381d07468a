"""Progress bars, atomically written folders, locks, rows, a process pool, and the machine's cores."""
