"""What crosses a process boundary: specs going out, rows coming back, and the KV arithmetic both sides share.

Imported by `orchestrator`, `workers` and `analysis`; imports none of them, and nothing heavy at import time.
"""
