"""Encoded images: formats, decoding on the host, and preparation for shards.

files.py         image files with 8 bits per channel: headers, verification, decoding to RGB
arrays.py        NumPy arrays (.npy)
pixel_format.py  channels and bits of a set, and decoding to them
tiff.py, dicom.py
                 files that are read once, during conversion, and stored in another form where necessary
prepare.py       one file -> what a shard holds
"""
