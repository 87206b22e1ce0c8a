"""Reading images, for training and prediction: PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000, DICOM, NIfTI.

Each format's reader describes and reads the images in a file; masks are read here, too. The layout of data sets is not
known here, only `Sample`.
"""
