"""Limits for opening untrusted files.

Sizes from headers are compared with these before anything is decompressed or allocated: three gigabytes of zeros
compress to three megabytes.
"""

#: Bytes of a volume, in its own dtype or as float32, whichever is larger: a cube of 1,024 voxels.
MAX_VOLUME_BYTES = 2**32
#: Bytes before the first voxel: header and extensions.
MAX_HEADER_BYTES = 2**24
#: Bytes after the last voxel, where a format (MGH) stores metadata.
MAX_FOOTER_BYTES = 2**20
#: Pixels of an image; radiographs and photographs of the eye have at most 25 million.
MAX_PIXELS = 100_000_000
#: Longer side of an image over its shorter one.
MAX_ASPECT = 32
#: Pixels of the square that an image is padded to.
MAX_SQUARE_PIXELS = 2**26
#: Decompressed bytes of a DICOM file whose data set is deflated.
MAX_DATASET_BYTES = 2**29
#: Bytes of a segmented palette, where each segment may stand for 65,535 colours.
MAX_SEGMENTED_PALETTE = 1024
#: Decompressed bytes of a table or text inside an archive.
MAX_TABLE_BYTES = 2**30
