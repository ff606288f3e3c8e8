"""The methods: how weights become codes, one module each, kernels beside them."""
