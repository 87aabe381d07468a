"""Progress bars, folders that are whole or absent, locks, a process pool, and the machine's cores."""
