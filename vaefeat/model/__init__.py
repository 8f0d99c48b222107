"""The variational auto-encoder in torch, one noun a file.

Each family of parts has its base class, its classes and its registry in one file: to add a posterior, prior, likelihood
or objective, write the class and enter its name there. :class:`~vaefeat.model.vae.VAE` puts the parts together.

=======================  ===============================================================
``preprocessing``        rows as they come -> the network's input, and back
``networks``             encoder and decoder networks
``posteriors``           q(z|x)
``priors``               p(z)
``flows``                invertible maps of latents, for both
``distributions``        of categorical, joint and deterministic latents
``likelihoods``          p(x|z)
``value_distributions``  of single values, for the likelihoods
``objectives``           what is maximised, in nats per row
``divergences``          what may stand in place of the KL term
``table``                columns of a table: where a network finds each, and their distribution
``corruption``           what is done to rows that are to be cleaned
``vae``                  the model
``classifier``           a linear head on the encoder
``labelled``             models of rows and their classes: M2, M1+M2, ADGM, SDGM
``evaluation``           held-out figures of a training run
``observation``          rows in batches, each with randomness of its own
``marginal_likelihood``  log p(x) by importance sampling, annealing, Hamiltonian draws
``hamiltonian``          the transitions of the latter two
``diagnostics``          what the latents carry; posterior collapse by its name
=======================  ===============================================================

Axes in names: B rows of a batch, C channels, H height, W width, F width of a hidden layer, L latents, K parameters of
the likelihood per value, S samples.
"""
