"""The article's MNIST program, on stock Keras layers or on fastconv's.

``data`` finds the images and needs no TensorFlow; ``article`` builds, trains and compares the
models; ``report`` prints the comparison.
"""
