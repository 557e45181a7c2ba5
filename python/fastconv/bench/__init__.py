"""``fastconv bench``: convolution and max-pooling kernels measured beside other libraries'.

``problem`` and ``suites`` say what is measured, ``adapters`` who is measured, ``reference`` what
the results must be, ``session`` and ``worker`` how times are taken, ``statistics`` what is said of
them; ``tables``, ``files``, ``plots`` and ``report`` show it, ``compare`` holds two runs against
each other.
"""
