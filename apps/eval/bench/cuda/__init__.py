"""`fathom bench ops --device cuda`: the Hopper kernels, checked and then timed, gate by gate."""
