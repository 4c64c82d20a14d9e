"""A grammar as llguidance takes it, and how much of one it may be given: steps and sizes, never seconds."""

from __future__ import annotations

from litchi.config import BadInput
from litchi.record import need
from litchi.schema.request import Grammar

STEPS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000}
SIZES = {"max_items_in_row": 2_000, "max_lexer_states": 50_000, "max_grammar_size": 200_000}
"""At llguidance's own speeds some 20 ms for the grammar, as much for a token at the very most, and 100 MB."""

LAYOUT = {"whitespace_pattern": r"[ \n\t]{0,16}"}
"""Between the signs of JSON: a model that likes line breaks must come to an end."""


def written(grammar: Grammar) -> str:
    """Raises BadInput for a schema that is no JSON object."""
    matcher = need("serve", "llguidance").LLMatcher
    try:
        match grammar.kind:
            case "schema":
                return matcher.grammar_from_json_schema(grammar.source, overrides=LAYOUT)
            case "regex":
                return matcher.grammar_from_regex(grammar.source)
            case "lark":
                return matcher.grammar_from_lark(grammar.source)
    except ValueError as error:
        raise BadInput(f"the grammar of the answer cannot be read ({str(error)[:200]}); mend it") from None
