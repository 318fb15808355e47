"""Is the promise kept, and if not, which component breaks it?"""
