"""Image input and output: decoding, cropping, PNG files, grids."""
