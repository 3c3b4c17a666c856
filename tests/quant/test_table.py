from torsh_quant._table import text_table


def test_an_empty_table_is_its_head():
    assert text_table(["a", "bc"], []) == "a  bc"


def test_columns_of_words_are_left_and_of_numbers_right():
    assert text_table(["name", "n"], [["a", "1,000"], ["bcdef", "-"]]).splitlines() == [
        "name       n",
        "a      1,000",
        "bcdef      -",
    ]
