"""DICOM volumes: an index of headers, rules from series to modality, and conversion to NIfTI."""
