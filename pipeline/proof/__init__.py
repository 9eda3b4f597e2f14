"""Proof that a pool is what it says: its rows against its plan, and the whole of it made again."""
