"""Progress bars, folders that are whole or absent, locks, and the machine's cores."""
