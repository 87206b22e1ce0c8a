"""The one reader of pictures, for training and prediction: PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000, DICOM, NIfTI.

Each format's reader describes and reads the images of a file; masks are read here too. No folder is walked by a data
set's layout here, and nothing of a data set but `Sample` is known.
"""
