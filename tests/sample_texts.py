"""Text that is always there, for the tests of tokenizers."""

import pydoc_data.topics

TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]  # the language reference
FOREIGN = "A língua não é um código: “ação” e «corazón» são palavras. 日本語 🙂 İstanbul ß e\u0301"
