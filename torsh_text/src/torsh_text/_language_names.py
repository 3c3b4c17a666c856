"""English names of the languages of lid.176."""

from collections.abc import Collection

_NAMES = """
af Afrikaans|als Alemannic|am Amharic|an Aragonese|ar Arabic|arz Egyptian Arabic|as Assamese
ast Asturian|av Avaric|az Azerbaijani|azb South Azerbaijani|ba Bashkir|bar Bavarian
bcl Central Bikol|be Belarusian|bg Bulgarian|bh Bihari|bn Bengali|bo Tibetan|bpy Bishnupriya
br Breton|bs Bosnian|bxr Buryat|ca Catalan|cbk Chavacano|ce Chechen|ceb Cebuano
ckb Central Kurdish|co Corsican|cs Czech|cv Chuvash|cy Welsh|da Danish|de German|diq Dimli
dsb Lower Sorbian|dty Dotyali|dv Dhivehi|el Greek|eml Emiliano-Romagnol|en English|eo Esperanto
es Spanish|et Estonian|eu Basque|fa Persian|fi Finnish|fr French|frr Northern Frisian
fy Western Frisian|ga Irish|gd Scottish Gaelic|gl Galician|gn Guarani|gom Goan Konkani
gu Gujarati|gv Manx|he Hebrew|hi Hindi|hif Fiji Hindi|hr Croatian|hsb Upper Sorbian|ht Haitian
hu Hungarian|hy Armenian|ia Interlingua|id Indonesian|ie Interlingue|ilo Iloko|io Ido
is Icelandic|it Italian|ja Japanese|jbo Lojban|jv Javanese|ka Georgian|kk Kazakh|km Khmer
kn Kannada|ko Korean|krc Karachay-Balkar|ku Kurdish|kv Komi|kw Cornish|ky Kirghiz|la Latin
lb Luxembourgish|lez Lezghian|li Limburgish|lmo Lombard|lo Lao|lrc Northern Luri|lt Lithuanian
lv Latvian|mai Maithili|mg Malagasy|mhr Eastern Mari|min Minangkabau|mk Macedonian|ml Malayalam
mn Mongolian|mr Marathi|mrj Western Mari|ms Malay|mt Maltese|mwl Mirandese|my Burmese|myv Erzya
mzn Mazanderani|nah Nahuatl|nap Neapolitan|nds Low German|ne Nepali|new Newari|nl Dutch
nn Norwegian Nynorsk|no Norwegian|oc Occitan|or Odia|os Ossetian|pa Punjabi|pam Pampanga
pfl Palatine German|pl Polish|pms Piedmontese|pnb Western Punjabi|ps Pashto|pt Portuguese
qu Quechua|rm Romansh|ro Romanian|ru Russian|rue Rusyn|sa Sanskrit|sah Yakut|sc Sardinian
scn Sicilian|sco Scots|sd Sindhi|sh Serbo-Croatian|si Sinhala|sk Slovak|sl Slovenian|so Somali
sq Albanian|sr Serbian|su Sundanese|sv Swedish|sw Swahili|ta Tamil|te Telugu|tg Tajik|th Thai
tk Turkmen|tl Tagalog|tr Turkish|tt Tatar|tyv Tuvinian|ug Uighur|uk Ukrainian|ur Urdu|uz Uzbek
vec Venetian|vep Veps|vi Vietnamese|vls West Flemish|vo Volapük|wa Walloon|war Waray|wuu Wu
xal Kalmyk|xmf Mingrelian|yi Yiddish|yo Yoruba|yue Cantonese|zh Chinese|und undetermined
"""

NAMES: dict[str, str] = {
    code: name
    for line in _NAMES.strip().splitlines()
    for code, _, name in (entry.partition(" ") for entry in line.split("|"))
}


def meant_code(name: str, codes: Collection[str]) -> str | None:
    """Return the code that somebody means who writes a name or another form of the code.

    Example:
        >>> meant_code("German", NAMES), meant_code("pt-BR", NAMES), meant_code("x", NAMES)
        ('de', 'pt', None)
    """
    folded = name.casefold()
    by_name = {spoken.casefold(): code for code, spoken in NAMES.items()}
    meant = by_name.get(folded, folded.replace("_", "-").partition("-")[0])
    return meant if meant in codes else None
