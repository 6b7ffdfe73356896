"""Recurrent networks, a few units wide."""

from __future__ import annotations

from torch import Tensor, nn


class LSTMLanguageModel(nn.Module):
    """Embedding, a stack of LSTMs and a decoder: logits of the next tokens, and the state; inputs (N, T) tokens."""

    def __init__(self, vocabulary: int = 32, width: int = 12, hidden: int = 16, drop: float = 0.2) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.encoder = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, hidden, num_layers=2, dropout=drop, batch_first=True)
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        embedded = self.drop(self.encoder(tokens))
        output, state = self.rnn(embedded, state)
        return self.decoder(self.drop(output)), state
