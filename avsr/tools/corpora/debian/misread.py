"""x"""

MISREAD: frozenset[str] = frozenset()
