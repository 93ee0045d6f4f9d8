"""How numbers reach a file: figures with names, pages whose prose holds no typed number, files whole or not at all."""
