"""Short texts of several kinds, from which samples are made with the tokenizer of a model."""

TEXTS = (
    "The bridge was closed for repairs, so the two villages shared one ferry until the end of spring.",
    "Whoever wrote the letter knew the house well: it names the loose step, the blue door and the dog.",
    "Yes.",
    "How do I change the address on an invoice that has already been sent?",
    "Water boils at 100 degrees Celsius at sea level, and at about 93 degrees on a mountain of 2,000 metres.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2021 GROUP BY name HAVING COUNT(*) > 3;",
    "La reunión empieza a las nueve y media; quien llegue tarde entra por la puerta de atrás.",
    "Der Zug nach Köln fährt heute von Gleis 7 ab, voraussichtlich zehn Minuten später.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
    "A refund is made within 14 days, provided that the goods are returned unused and in their original packaging.",
    "Not bad at all, but the second half is far too long and the ending explains what everyone has already understood.",
    "Il pleuvait depuis trois jours, et la rivière atteignait déjà la deuxième marche.",
    "Mix the flour and the salt, add the oil and enough water for a soft dough, and let it rest for an hour.",
    "東京から大阪まで、新幹線で約二時間半かかります。",
    "The committee met four times, heard eleven witnesses and, in the end, recommended what it had been asked to recommend.",
)
"""Texts of 1 to 40 words: prose, questions, code, numbers and several languages."""
