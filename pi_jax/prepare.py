"""`python -m pi_jax.prepare`: text to tokens. See `pi_jax.data.prepare`."""

from pi_jax.data.prepare import main

if __name__ == "__main__":
    main()
