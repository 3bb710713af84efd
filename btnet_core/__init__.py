"""BTNet: learning unified representations for multi-resolution face recognition (BMVC 2023)."""
