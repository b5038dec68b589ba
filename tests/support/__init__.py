"""What the tests share: people, servers, databases, raw sockets, mutations, the model."""
