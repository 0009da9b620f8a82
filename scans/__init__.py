"""Scans as they lie on disk: layouts, NIfTI files, checked and cached cases, phantoms."""
