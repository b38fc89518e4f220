"""The pool on Ray; no other package imports ray."""
