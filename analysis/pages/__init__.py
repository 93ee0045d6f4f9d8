"""The artifacts a reader opens: each module makes one, or one of its plots, from what the other rooms found."""
