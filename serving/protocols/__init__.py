"""What clients speak: pure functions between bytes and arrays, which know neither HTTP nor the models.

===================  ==================================================================================================
``oip``              the Open Inference Protocol v2 over REST: JSON, and the binary tensor extension
``oip_grpc``         the same over gRPC, with ``grpc.health.v1``
``oip_messages``     its protobuf messages
``openai``           embeddings as OpenAI's clients ask for them
``tensors``          what both have in common: a named tensor becomes rows or encoded images
``content_coding``   gzip and deflate, bounded
===================  ==================================================================================================
"""
